"""Pictures up, results down: uploads, downloads, transfer, partial files, paths, address rules, file types."""
