"""`export`: the journal as JSON lines, and a copy of all data that needs this program no more.

`lines` writes the journal, `copying` runs a copy: out of one of `sources`, into a `folder` or a
`bucket`, with a `manifest` of what was copied. docs/export.md describes both formats.
"""
