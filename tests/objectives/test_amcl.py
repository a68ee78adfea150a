VARIANTS = [
    {"base": "infonce", "heads": 2, "kappa": 3, "detach": False},
    {"base": "simsiam", "heads": 2},
    {"base": "barlow", "heads": 2, "eta_low": 0.5, "eta_up": 1.5},
    {"heads": 1, "kappa": 1},
]
