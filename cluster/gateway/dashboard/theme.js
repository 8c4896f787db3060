// Light or dark: as the system has it, unless somebody says otherwise here. Loaded before anything is drawn.

const CHOICES = ["system", "light", "dark"];
const KEY = "foretoken-theme";

function stored() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null; // a browser may forbid it
  }
}

function store(choice) {
  try {
    localStorage.setItem(KEY, choice);
  } catch {
    // it holds for this page
  }
}

function use(choice) {
  if (choice === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
}

let choice = CHOICES.includes(stored()) ? stored() : "system";
use(choice);

export function startTheme(button) {
  const label = () => (button.textContent = `Theme: ${choice}`);
  button.addEventListener("click", () => {
    choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
    use(choice);
    store(choice);
    label();
  });
  label();
}
