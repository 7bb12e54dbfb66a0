"""What an adapter is.

Doors: `files.read_adapter` (directory → config and headers), `fit.check_fit` (does it fit this
base?), `weights.load_weights` (what the engine applies), `identity.content_identity`,
`manifest.Manifest`, `folder.find_adapters` and `scan_adapters` (names in a folder),
`store.AdapterStore` (a folder that is kept safe), `check.check_adapter`.
"""
