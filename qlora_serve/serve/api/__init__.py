"""The HTTP surface. Door: `app.create_app`."""
