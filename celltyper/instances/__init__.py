"""Instance methods: labels to targets, predicted maps to labels."""
