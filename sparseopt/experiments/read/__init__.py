"""Reading and writing of what people smooth: tables, signals at nodes, images and volumes; nothing is unpickled."""
