# SPDX-License-Identifier: Apache-2.0
"""What came out.

result.py   what is kept of a cell            figures.py  its figures
evaluate.py arms against each other           story.py    one transfer seen closely
tables.py   tables, and reports of them       plots.py    pictures
report.py   JSON, terminal, page (page.html.j2)
"""
