"""A sound BIDS-PET sidecar of three frames."""

BIDS = {
    "Units": "Bq/ml",
    "TracerRadionuclide": "C11",
    "InjectedRadioactivity": 573,
    "InjectedRadioactivityUnits": "MBq",
    "TimeZero": "13:04:42",
    "ScanStart": 0,
    "InjectionStart": 0,
    "FrameTimesStart": [0, 10, 30],
    "FrameDuration": [10, 20, 30],
    "ImageDecayCorrected": True,
    "ImageDecayCorrectionTime": 0,
}
