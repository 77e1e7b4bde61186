"""The Procfile's commands as processes: what an operator and a sender see of the service."""
