// Runs before the first paint, so that a chosen theme does not flash in the other one's colours.
{
  const chosen = (() => {
    try {
      return localStorage.getItem("fate.theme");
    } catch {
      return null; // storage is switched off
    }
  })();
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
}
