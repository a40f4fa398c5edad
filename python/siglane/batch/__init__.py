"""Many requests from a file to a file, so that a bad row costs its row and a kill costs nothing."""
