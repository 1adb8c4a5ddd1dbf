"""Result files to figures, tables and pages: pure functions of the records.

records, matching, pairs, comparison   read, join, errors, groups
labels, axes                           words and units for points, metrics and axes
points, curves                         what figures and charts draw, as numbers
tabular, tables, tabulate, report_tables   tables as data, and their renderings
ranking, report                        verdict and everything a report says
figures                                one function a figure (matplotlib)
illustrations, charts, roofline_chart, page_data, html   the interactive page
documents, excel                       HTML, Markdown, PDF, CSV, XLSX, JSON by file ending
"""
