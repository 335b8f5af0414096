"""Turn the bytes of a photo into pixels, and pixels into encoded samples."""
