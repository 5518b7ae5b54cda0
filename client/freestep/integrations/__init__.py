"""What other libraries' training loops need: a module for each library, which the rest of freestep never imports."""
