"""The bytes of pictures and videos: items of a request, where they come from, what may be fetched."""
