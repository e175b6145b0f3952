"""The power service: meters, the ledger of their energy, the tariff for engine time, the carbon signal.

Invariant: per device, metered = billed + idle + unattributed, in whole microjoules, at
all times and across restarts; nothing is ever written to a device.
"""
