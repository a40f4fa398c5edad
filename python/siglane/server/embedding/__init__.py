"""Images and texts as vectors, their labels and scores: the towers of a SigLIP."""
