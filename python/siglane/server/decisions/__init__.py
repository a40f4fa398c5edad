"""Questions answered by how likely each label is, and scores: nothing is generated."""
