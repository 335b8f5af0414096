"""List and read raw photos from folders, archives, tables, list files and S3."""
