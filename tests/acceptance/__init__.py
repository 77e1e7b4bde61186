"""The commands of the Procfile as processes, as an operator and a sender see them."""
