// What stands where: the live numbers, the playground, the theme.

import { byId } from "./dom.js";
import { follow } from "./live.js";
import { Playground } from "./playground.js";
import { startTheme } from "./theme.js";

startTheme(byId("theme"));
const playground = new Playground();
follow((status) => playground.take(status));
