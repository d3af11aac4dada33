"""A complete Django site with the relay: see the section on it in README.md."""
