"""What touches disk and network for everybody: paths, whole writes, files that are not trusted, the Hub."""
