"""Scores of results: data sets, metrics with their definitions, runs, comparisons and reports."""
