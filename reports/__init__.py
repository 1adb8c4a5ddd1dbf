"""Result files to figures, tables and pages: pure functions of the records.

records     reads result files            labels   words for points, metrics, numbers
comparison  joins, errors, groups         points   what figures and charts draw, as numbers
tables      tables and their renderings   figures  one function a figure
"""
