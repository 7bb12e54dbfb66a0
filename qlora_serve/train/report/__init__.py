"""What an adapter's directory says about itself to people: README.md, report.html, recipe.yaml.

Door: `page.write_report`.
"""
