"""What compiled loops can take, for those who ask before anything is compiled."""

GROUP = 32  # query heads of one key head, at most
