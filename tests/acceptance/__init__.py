"""The Procfile's commands as strangers see them: nothing of the product is imported here."""
