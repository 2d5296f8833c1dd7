"""The default corpus: emoji in many drawing styles with their names, and the zero-shot tasks that it is judged by."""
