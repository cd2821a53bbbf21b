"""The decoder on a processor: one native pass per half layer, with the same results for a row in any company.

The modules beside this folder are the obvious version. It runs where there is no compiler, and judges this one.
"""
