"""What compiled loops can take, for those who ask before anything is compiled."""

GROUP = 32  # query heads of one key head, at most
TOGETHER = 16  # key heads that a thread takes at a time, at most
