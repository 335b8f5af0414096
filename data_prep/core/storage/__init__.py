"""Storage under the root: a local folder or an S3 prefix behind one interface."""
