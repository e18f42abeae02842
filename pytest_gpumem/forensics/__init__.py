"""What went wrong: message grammars, log readers, sequence analysis, comparison."""
