"""Networks by name, and trained ones in files and on the Hugging Face Hub."""
