"""What is computed: update rules, coefficients, schedules and averages."""
