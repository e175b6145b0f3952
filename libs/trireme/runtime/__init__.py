"""What every main shares: settings, serving, health, telemetry, clock, shutdown."""
