"""From an image's size to its layout: pure integers, one file a rule."""
