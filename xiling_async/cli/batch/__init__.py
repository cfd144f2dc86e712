"""`xiling batch`: rows in, videos and a page out, resumable."""
