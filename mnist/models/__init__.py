"""Networks (networks.py) by name; trained models in files and on the Hugging Face Hub."""
