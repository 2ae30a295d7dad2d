"""Each mixer held against code that nobody here wrote, or its definition: the tests that do so, and the differences that they find."""
