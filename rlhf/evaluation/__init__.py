"""What is measured on finished policies: statistics with intervals, measures of text, comparisons."""
