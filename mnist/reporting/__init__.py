"""What a person sees of a run: the terminal, the plots, the report page."""
