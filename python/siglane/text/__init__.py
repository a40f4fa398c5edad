"""SigLIP's text tower, and how a text becomes its tokens."""
