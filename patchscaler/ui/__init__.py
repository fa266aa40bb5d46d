"""The page: controls, panels and the work behind them."""
