"""A complete Django site with the relay: docs/django.md describes it."""
