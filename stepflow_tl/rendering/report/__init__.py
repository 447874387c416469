"""The report: one trace's maps, text and profiles as a single interactive page.

`quantise` (maps in bytes) -> `payload` (what the page knows) -> `page` (template, policy, file). The page's
own script and style are the files of `assets/`.
"""
