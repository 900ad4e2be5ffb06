"""05_deploy: one folder that holds all that is served, the service, its page."""
