"""What serves the method and does not teach it: flags, files, evaluation, analysis, ablations."""
