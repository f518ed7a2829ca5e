"""Disk and network access for all rooms: paths, atomic writes, untrusted files, the Hugging Face Hub."""
