"""A tool that knows the weather everywhere."""

from models.config import config


@config
class WeatherConfig:
    """Answers `[[Ulm]]`."""

    opens: str = "[["
    closes: str = "]]"
    before: str = " ("
    after: str = ")"
    sky: str = "rain"

    def __call__(self, text: str) -> str:
        """Return what the sky does over a town."""
        return f"{self.sky} in {text}"
