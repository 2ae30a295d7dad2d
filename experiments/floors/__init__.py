"""What simple methods reach on the recipes' own data: the numbers to beat, one file a method."""
