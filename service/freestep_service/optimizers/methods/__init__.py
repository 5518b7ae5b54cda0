"""What is computed: update rules, coefficients, schedules and averages. Each file cites its papers."""
