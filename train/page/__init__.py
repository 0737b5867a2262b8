"""The night as one page that a browser opens from a file: `python -m train.report`.

`facts` has what is shown, as data, which `--json` prints; `folders` and `running` read what lies in the runs' folders;
`html` makes the page of the facts, with `page.css`, `page.js` and the plotting library inside it.
"""
